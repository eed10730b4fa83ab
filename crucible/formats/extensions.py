"""Extensions of media files, as `datasets` 5.2 lists them, without dots. A repo's format is guessed from these."""

from __future__ import annotations

IMAGE = (
    "blp bmp dib bufr cur pcx dcx dds ps eps fit fits fli flc ftc ftu gbr gif grib png apng jp2 j2k jpc jpf jpx "
    "j2c icns ico im iim tif tiff jfif jpe jpg jpeg mpg mpeg msp pcd pxr pbm pgm ppm pnm psd bw rgb rgba sgi ras tga "
    "icb vda vst webp wmf emf xbm xpm"
)
SOUND = (
    "aiff au avr caf flac htk svx mat4 mat5 mpc2k ogg paf pvf raw rf64 sd2 sds ircam voc w64 wav nist wavex wve xi mp3 "
    "opus"
)
AUDIO = f"{SOUND} 3gp 3g2 avi asf flv mp4 mov m4v mkv mpg webm f4v wmv wma ogg ogm mxf nut"
VIDEO = "mkv mp4 avi mpeg mov"
PDF = "pdf"
MESH = "glb gltf ply stl"
NIFTI = "nii"
