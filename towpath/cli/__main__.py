"""The command `towpath`: a table of verbs, each in a module that is imported only when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from towpath.cli.options import Settings, common, explained, misuse_in_json

VERBS = {  # verb → (module under towpath.cli, its command, what --help says)
    "agent": ("agent", "agent", "Run the agent of this node in the foreground."),
    "attach": ("attach", "attach", "Attachments: ls, show, rm, check."),
    "cni": ("cni", "cni", "CNI executables: install, uninstall."),
    "config": ("config", "config", "The agent's configuration: check, show."),
    "exec": ("run", "exec_", "Run a command inside a running one's namespaces."),
    "ipam": ("ipam", "ipam", "Address pools: ls."),
    "network": ("network", "network", "Networks: ls, create, show, rm."),
    "ps": ("run", "ps", "List what `towpath run` started."),
    "run": ("run", "run", "Run a command on a network, in a namespace of its own."),
    "status": ("status", "status", "How the agent is doing."),
    "stop": ("run", "stop", "Stop what `towpath run` started."),
    "version": ("status", "version", "The version of this command."),
}


GIVEN = "towpath.given"  # where a call's context keeps its arguments


class Verbs(click.Group):
    """A group that knows its commands by name; only the one that is called is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, command, _ = VERBS[cmd_name]
        found: click.Command = getattr(import_module(f"towpath.cli.{module}"), command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, VERBS[verb][2]) for verb in sorted(VERBS)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(unknown_verb(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = tuple(args)  # parsing takes them off the list
        with misuse_in_json(given):
            ctx = super().make_context(info_name, args, parent, **extra)
        ctx.meta[GIVEN] = given
        return ctx

    def invoke(self, ctx: click.Context) -> object:
        with misuse_in_json(ctx.meta[GIVEN]), explained(ctx):
            return super().invoke(ctx)


def unknown_verb(given: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(given, VERBS, n=1)
    return f"no such command {given!r}" + (f": did you mean {near[0]!r}?" if near else "")


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@common
@click.pass_context
def towpath(ctx: click.Context) -> None:
    """Container networking for plain Linux hosts: one network for every runtime, and for bare commands.

    Commands talk to the agent at --socket or $TOWPATH_SOCKET. They exit with 0 when all is well, 1 when it failed,
    2 when they were called wrongly.
    """
    ctx.ensure_object(Settings)


def main() -> None:
    """Entry point of the console script."""
    towpath(prog_name="towpath")


if __name__ == "__main__":
    main()
