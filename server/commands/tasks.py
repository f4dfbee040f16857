"""`polyhead tasks …`: the tasks of a server or of a registry."""

import typer

from polyhead.server.commands.fit_served import fit_served_command
from polyhead.server.commands.materialise import materialise_command
from polyhead.server.commands.registry import export_command, import_command
from polyhead.server.commands.served_tasks import (
    create_command,
    list_command,
    rollback_command,
    show_command,
)

tasks_app = typer.Typer(help="Look at tasks, change them, move them.", no_args_is_help=True)
tasks_app.command("list")(list_command)
tasks_app.command("show")(show_command)
tasks_app.command("create")(create_command)
tasks_app.command("fit")(fit_served_command)
tasks_app.command("rollback")(rollback_command)
tasks_app.command("materialise")(materialise_command)
tasks_app.command("export")(export_command)
tasks_app.command("import")(import_command)
