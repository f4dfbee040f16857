"""`polyhead tasks …`: the tasks of a server or of a registry."""

import typer

from polyhead.server.commands.registry import export_command, import_command

tasks_app = typer.Typer(help="Look at tasks, change them, move them.", no_args_is_help=True)
tasks_app.command("export")(export_command)
tasks_app.command("import")(import_command)
