"""`python -m components` is `urm`, for launchers that want a module, such as torchrun."""

from components.cli.app import run_app

run_app()
