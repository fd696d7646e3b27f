"""Train CR-Net and full rank on one text, evaluate both, and let the better one write.

    python examples/train.py corpus.txt runs

One shape, the same rows in the same order. What else can be set, and what a result has:
docs/python.md.
"""

import sys

import crnet

corpus, out = sys.argv[1:3]
config = crnet.configure("tiny", source=corpus, documents="paragraph", steps=40, lr=3e-3)
config = crnet.configure(config, hidden_size=64, num_heads=4, intermediate_size=176, num_layers=4)
config = crnet.configure(config, sequence_length=64, batch_size=4)
losses = {}
for linear in ("crnet", "full"):
    result = crnet.train(config, out=f"{out}/{linear}", linear=linear, progress=False)
    assert result.after is not None
    losses[linear] = result.after.loss
    rows = crnet.cost(config, linear=linear)
    count = next(row.value for row in rows if row.term == "total")
    print(f"{linear}: {count:,.0f} parameters, perplexity {result.after.perplexity:.1f}")
best = min(losses, key=losses.__getitem__)
assert crnet.evaluate(f"{out}/{best}").loss == losses[best]
print(crnet.load(f"{out}/{best}").generate("The", max_tokens=20, temperature=0.8))
