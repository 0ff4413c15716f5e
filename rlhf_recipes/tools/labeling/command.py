"""The command `rlhf-recipes label`: serve the labelling page, or export what was judged."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_recipes.tools.labeling.guard import App
    from rlhf_recipes.tools.labeling.store import Store

PASSWORD = "RLHF_RECIPES_LABEL_PASSWORD"
_SHORTEST = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command.

    Args:
        parser: The parser of `rlhf-recipes label`.
    """
    parser.add_argument(
        "--db", type=Path, required=True, help="SQLite file with the judgements; made if it is missing"
    )
    parser.add_argument("--data", help="file, folder or dataset id with the answers to compare; needed once")
    parser.add_argument(
        "--add", metavar="FILE", help="add rows to the database, also while its page is open, and serve nothing"
    )
    parser.add_argument("--labels_per_item", type=int, metavar="K", help="labellers for each item (default: 1)")
    parser.add_argument("--shared", type=float, help="share of the items that K label, the others one (default: 1)")
    parser.add_argument("--seed", type=int, help="seed of all orders, set when the file is made (default: 0)")
    parser.add_argument(
        "--lease_minutes",
        type=float,
        default=30.0,
        help="how long an item on a page is nobody else's (default: 30)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8731, help="port to serve, 0 for a free one (default: 8731)")
    parser.add_argument("--password", help=f"what labellers must know; better set {PASSWORD}, which no list shows")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write the judgements to a file, and serve nothing"
    )
    parser.add_argument(
        "--format",
        choices=("preferences", "votes", "label_studio"),
        default="preferences",
        help="what is exported: rows for the reward stage, votes for `rank`, or Label Studio's (default: preferences)",
    )
    parser.set_defaults(run=label)


def label(args: argparse.Namespace) -> str:
    """Run the command.

    Args:
        args: What `add_arguments` reads.

    Returns:
        What was written or added, as text.

    Raises:
        FileExistsError: If an export would overwrite a file.
        FileNotFoundError: If there is neither a database nor data.
        OSError: If the port is taken.
        ValueError: If rows cannot be used, the database is of other data, or more than this machine could reach the
            page without a password.
    """
    if args.export is not None:
        return _export(args)
    if args.add is not None:
        return _add(args)
    password = _password(args)
    from rlhf_recipes.tools.labeling.app import guarded_app  # a package that is missing is said before all else

    store = _open(args, password or "")
    try:
        store.want(args.labels_per_item, args.shared)
        return _serve(args, guarded_app(store, args.host, password), store)
    finally:
        store.close()


def _password(args: argparse.Namespace) -> str | None:
    from rlhf_recipes.tools.labeling.guard import is_loopback

    password: str | None = os.environ.get(PASSWORD) if args.password is None else args.password
    if password is not None and len(password) < _SHORTEST:
        raise ValueError(f"The password has {len(password)} characters. Give at least {_SHORTEST}.")
    if password is None and not is_loopback(args.host):
        raise ValueError(
            f"Others could reach {args.host}, and there is no password. Set {PASSWORD} (or `--password`), or leave "
            "out `--host` and reach this machine through `ssh -L`."
        )
    if args.lease_minutes <= 0:
        raise ValueError(f"`--lease_minutes` must be above 0, got {args.lease_minutes:g}.")
    return password


def _open(args: argparse.Namespace, secret: str) -> Store:
    from rlhf_recipes.tools.labeling.database import create
    from rlhf_recipes.tools.labeling.store import Store

    new = not args.db.exists() or args.db.stat().st_size == 0
    if new and args.data is None:
        raise FileNotFoundError(f"There is no {args.db} yet. Name the answers to compare with `--data`.")
    if args.data is not None:
        from rlhf_recipes.tools.labeling.label_studio import read_items_and_judgements  # it takes seconds

        items, past = read_items_and_judgements(args.data)
    if new:
        create(args.db, items, source=args.data, seed=args.seed or 0, past=past)
    store = Store(args.db, args.lease_minutes * 60, secret)
    try:
        if args.data is not None:
            store.check_same(items, args.data)
        if args.seed is not None and str(args.seed) != store.settings["seed"]:
            raise ValueError(f"{args.db} was made with the seed {store.settings['seed']}, got {args.seed}.")
    except ValueError:
        store.close()
        raise
    return store


def _serve(args: argparse.Namespace, app: App, store: Store) -> str:
    import uvicorn

    # Bound here: uvicorn would end the process with a message of its own where the port is taken.
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as server:
        host = f"[{args.host}]" if ":" in args.host else args.host
        sys.stdout.write(f"Label at http://{host}:{server.getsockname()[1]}/ (Ctrl-C ends; nothing is lost)\n")
        sys.stdout.flush()
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,  # who sends `X-Forwarded-For` would choose whose rate limit counts
            limit_concurrency=200,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends in order, and raises it again
            uvicorn.Server(config).run(sockets=[server])
    number = sum(judgement.undone_at is None for judgement in store.judgements())
    return f"{args.db}: {number} judgements. `--export` writes them to a file."


def _add(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.labeling.items import read_items
    from rlhf_recipes.tools.labeling.store import Store

    if args.data is not None:
        raise ValueError("`--add` adds to the rows that the database was made of. Leave out `--data`.")
    store = Store(args.db)
    try:
        items = read_items(args.add)
        if not store.add(items, args.add):
            return f"{args.db} has the rows of {args.add} already."
        return f"{args.db}: {len(items)} items added, {len(store.items())} in all. An open page shows them next."
    finally:
        store.close()


def _export(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.labeling.export import write_export
    from rlhf_recipes.tools.labeling.store import Store

    store = Store(args.db)
    try:
        if args.data is not None:
            raise ValueError("An export takes everything from `--db`. Leave out `--data`.")
        return write_export(store, args.export, args.format)
    finally:
        store.close()
