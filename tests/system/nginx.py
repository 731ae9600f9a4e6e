"""A real nginx as a local service, in its own directory: files to fetch, and PUT to store what comes.

nginx = Nginx(directory); nginx.url; nginx.files / "name"; nginx.close()
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

from running import poll

_CONFIG = """
daemon off; worker_processes 1; pid {root}/pid; error_log {root}/error.log; {user}
events {{ worker_connections 512; }}
http {{
  access_log off; types {{ }} default_type application/octet-stream; client_max_body_size 0;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{
    listen 127.0.0.1:{port}; root {root}/files; sendfile on; keepalive_requests 100000;
    location /up/ {{ dav_methods PUT DELETE; create_full_put_path on; }}
  }}
}}
"""


class Nginx:
    def __init__(self, root: Path) -> None:
        """It must be installed: these tests fail without it, they don't skip."""
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        assert program is not None, "nginx is not installed: apt-get install nginx-light (with its dav module)"
        self.files = root / "files"
        (self.files / "up").mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        user = "user root;" if os.geteuid() == 0 else ""  # the directory is only ours
        config = root / "nginx.conf"
        config.write_text(_CONFIG.format(root=root, port=self.port, user=user))
        self.process = subprocess.Popen(
            [program, "-e", str(root / "error.log"), "-c", str(config), "-p", str(root)], stdin=subprocess.DEVNULL
        )
        poll(self._is_up, "nginx listens")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, "nginx has ended"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == 0
