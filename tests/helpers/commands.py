"""The `cacheslide` command on the shipped model."""

import json

from cacheslide.cli import main

MODEL = "models/tiny-llama-12m"
NOTES = "\nSession notes\n amber falcon is copper seven . silver otter is bone ten ."
DOCUMENT = "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ."


def write(path, notes, question="\nQuestion: what is brave ibex ?\nAnswer:"):
    segments = [
        {"role": "reuse", "text": "Answer each question with the value that the name stands for ."},
        {"role": "recompute", "text": notes},
        {"role": "reuse", "text": DOCUMENT, "name": "document"},
        {"role": "recompute", "text": question},
    ]
    path.write_text(json.dumps({"segments": segments}))
    return str(path)


def run(capsys, *args):
    code = main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err
