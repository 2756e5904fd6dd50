"""Exit status 0 when the metrics port of this container answers: the server is up, and no token is needed to ask."""

from __future__ import annotations

import os
import sys
import urllib.request

address = f"http://127.0.0.1:{os.environ.get('ASR_EXIT_METRICS_PORT', '9464')}/metrics"
try:
    with urllib.request.urlopen(address, timeout=3) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except OSError as error:
    sys.exit(f"{address}: {error}")
