"""Read what an offline W&B run holds, and so what `wandb sync` will send."""

import json
import struct
from collections import defaultdict
from types import SimpleNamespace

from wandb.proto.wandb_internal_pb2 import Record


def read_offline(folder):
    """Read the log of an offline W&B run: protobuf records in LevelDB's log format, after a header of 7 bytes."""
    [file] = folder.glob("run-*.wandb")
    data, place, part, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(part))
            part = b""
    return records


def facts(folder):
    """What the run will say after `wandb sync`: its place, config, history, summary, defined metrics and artifacts."""
    found = SimpleNamespace(config={}, history=[], summary={}, metrics={}, artifacts={}, tables=defaultdict(list))
    for record in read_offline(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            found.config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in update}
        elif kind == "history":
            found.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts[record.artifact.name] = record.artifact
    for row in found.history:
        for name in [key.removesuffix("/_type") for key, value in row.items() if value == "table-file"]:
            table = json.loads((folder / "files" / row[f"{name}/path"]).read_text())
            found.tables[name].append([dict(zip(table["columns"], values, strict=True)) for values in table["data"]])
    return found


def _name(item):
    return item.key or "/".join(item.nested_key)
