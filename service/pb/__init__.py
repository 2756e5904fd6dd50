"""Generated from ``proto/`` by ``python -m service.generate``; do not edit the files beside this one."""
