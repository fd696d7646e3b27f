"""Attention Residuals: every sublayer reads a learned average of all that was written before it.

``x = sum_j p_j v_j``, ``p = softmax_j(w . RMSNorm(v_j))`` over the embedding v_0 and the outputs
v_1, v_2, ... of all earlier sublayers; w, one a sublayer, starts at zero (a plain average). The
norm has no gain: w is one.

Source: arXiv:2603.15031, without its variant that sums groups of layers first. Deviation: the
first sublayer has one tensor to choose from, the embedding, and needs no w, which nothing could
train.
"""

from __future__ import annotations

from crnet.specs import StreamWork, TensorSpec, constant, in_each_way
from crnet.streams import Stream


class AttentionResiduals(Stream):
    name = "attnres"
    summary = "a learned average of the embedding and all earlier outputs, one a sublayer"
    policies = ("none", "block")

    def tensors(self, sublayer_idx, num_sublayers, shape, options):
        if not sublayer_idx:
            return {}
        return {
            "weight": TensorSpec(
                (shape.hidden_size,), "gain", constant(0.0), dtype="float32", decays=False
            )
        }

    def work(self, sublayer_idx, num_sublayers, rows, hidden_size, item_bytes, written_bytes):
        sources, size = sublayer_idx + 1, rows * hidden_size * item_bytes
        is_last = sublayer_idx == num_sublayers
        # Elementwise, of each source, forward: square, mean, score, share; backward: slope, three
        # gradients, and their sum with those of other reads. Nothing is compiled into one.
        counted = sources if sublayer_idx else 0
        items = counted * rows * hidden_size
        return StreamWork(
            # Of each source its share and its inverse norm, fp32. What the first sublayer gets is
            # the embedding, which counts as kept already.
            kept_bytes=2 * 4 * rows * sources if sublayer_idx else -size,
            keeps_writes=True,
            gradient_bytes=0
            if is_last
            else size + (sources - 1) * rows * hidden_size * written_bytes,
            passes=in_each_way(28 * items, 7 * counted),
            backward_passes=in_each_way((52 + 3 * item_bytes) * items, 12 * counted),
        )

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams.attnres.module import Average, First

        return Average(shape.hidden_size, shape.norm_eps) if sublayer_idx else First()


METHODS = [AttentionResiduals()]
