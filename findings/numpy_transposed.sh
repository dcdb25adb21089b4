#!/usr/bin/env bash
# safetensors.numpy saves a transposed array with its numbers in the wrong places.
#
# Versions: safetensors 0.8.0, numpy 2.4.6.
# Seen: a.T of [[0, 1, 2], [3, 4, 5]] is saved and read back as [[0, 1], [2, 3], [4, 5]] instead of
# [[0, 3], [1, 4], [2, 5]]. A copy of it made by numpy.ascontiguousarray comes back right.
# Why one guesses wrong: numpy's own save keeps any array, and safetensors.torch refuses a
# transposed tensor with an error that names the remedy. The numpy side writes the memory as it
# lies, under the shape of the view. Nothing is raised, the shape is right, the sum is right; it
# hits exactly those who turn weights from (in, out) to (out, in) while converting them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
from safetensors.numpy import load_file, save_file

turned = np.arange(6.0).reshape(2, 3).T
save_file({"view": turned, "copy": np.ascontiguousarray(turned)}, "weights.safetensors")
back = load_file("weights.safetensors")
print(turned.tolist(), back["view"].tolist(), back["copy"].tolist())
assert (back["copy"] == turned).all()
assert back["view"].tolist() == [[0, 1], [2, 3], [4, 5]] != turned.tolist()
END
