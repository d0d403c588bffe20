"""The default system.

The only rule that held both on prompts it was not tuned on and on the stress task (docs/real.md, "Other prompts"). It
needs no selection layer: its tokens are known before the prefill starts, from the scores of retained chunks and from
the prompt's ids. The paper's own rule is `cacheslide`.
"""

DEFAULT_SYSTEM = "cacheslide_mixed"
