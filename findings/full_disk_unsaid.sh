#!/usr/bin/env bash
# On a full disk torch.save, given an open file, ends in "unexpected pos", not in "No space left".
#
# Version: torch 2.13.0.
# Seen: with a limit of 200,000 bytes for a file, saving a million zeros into an open file raises
# RuntimeError "[enforce fail at inline_container.cc:672] . unexpected pos 4000704 vs 598"; the
# OSError "File too large" is only its __context__. With a limit of 1,000 bytes for a small tensor,
# the OSError itself is raised. So `except OSError` catches one of the two.
# Why one guesses wrong: whoever opens the file himself expects the errors of his own write(), and a
# first test, with a small file, confirms it. But the zip writer is closed while the error passes
# through, finds itself at another place than it counted, and raises an error of its own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import resource
import torch


def error(limit, tensor):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        with open("tensor.pt", "wb", buffering=0) as file:
            torch.save(tensor, file)
    except Exception as error:
        return type(error).__name__, type(error.__context__).__name__, str(error)


small, large = error(1000, torch.zeros(1)), error(200_000, torch.zeros(10**6))
print(small, large, sep="\n")
assert small[0] == "OSError", small
assert large[:2] == ("RuntimeError", "OSError") and "unexpected pos" in large[2], large
END
