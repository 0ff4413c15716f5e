#!/usr/bin/env bash
# tensorboard 2.21.0: EventAccumulator(folder).Scalars(tag), the usual way to read a run in Python.
# Guess: all points that were written come back.
# Seen: by default it keeps a random sample of 10000 points of each scalar and says nothing. Of 30000 steps 20000 are
#   gone, among them the one step at which the KL was 50: the largest KL reads 0.1.
# Hurts: whoever looks for spikes, maxima or the best step of a long run in its event files. EventAccumulator(folder,
#   size_guidance={"scalars": 0}) keeps everything.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tensorboard==2.21.0
venv/bin/python -I - <<'EOF'
import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

writer = EventFileWriter("run")
for step in range(30000):
    value = Summary.Value(tag="objective/kl", simple_value=50.0 if step == 12345 else 0.1)
    writer.add_event(Event(step=step, wall_time=float(step), summary=Summary(value=[value])))
writer.close()


def read(**options):
    accumulator = EventAccumulator("run", **options)
    accumulator.Reload()
    points = accumulator.Scalars("objective/kl")
    return len(points), max(point.value for point in points)


default, everything = read(), read(size_guidance={"scalars": 0})
print("tensorboard", tensorboard.__version__)
print("guess: 30000 points, the largest 50.0")
print(f"seen: {default[0]} points, the largest {default[1]:.1f}; with size_guidance 0: {everything}")
assert everything == (30000, 50.0)
assert default[0] == 10000 and default[1] < 1, "the behaviour has changed"
EOF
