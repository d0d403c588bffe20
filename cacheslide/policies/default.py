"""The system that runs where none is named.

The one rule that held on prompts it was not chosen on and on the stress task too (docs/real.md, "Other prompts"). It
needs no selection layer: its tokens are known before the start, from scores that retained chunks carry and from the
prompt's own ids. The paper's own rule is `cacheslide`.
"""

DEFAULT_SYSTEM = "cacheslide_mixed"
