"""A Hub of your own: the read API over a folder of repos, on aiohttp.

import_folder(root, "org/data", "./data")    put a folder in, as one commit
serve(root, port=8080)                       serve it until a signal
with HubServer(root) as hub: hub.endpoint    serve it beside other work, on free ports
"""

from .access import User
from .app import ORIGIN
from .importing import (
    create_branch,
    create_pr,
    create_tag,
    delete_repo,
    import_files,
    import_folder,
    rename_repo,
    set_access,
)
from .log import RequestRecord
from .options import HubOptions
from .ratelimit import RateLimits
from .service import HubServer, serve

__all__ = [
    "ORIGIN",
    "HubOptions",
    "HubServer",
    "RateLimits",
    "RequestRecord",
    "User",
    "create_branch",
    "create_pr",
    "create_tag",
    "delete_repo",
    "import_files",
    "import_folder",
    "rename_repo",
    "serve",
    "set_access",
]
