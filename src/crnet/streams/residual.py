"""The residual stream: every sublayer adds to it, ``x <- x + y``.

Source: He et al. 2015 (arXiv:1512.03385), in the form that GPT-2 has it, norms inside the branch.
"""

from __future__ import annotations

import dataclasses

from crnet.specs import StreamWork
from crnet.streams import Stream
from crnet.streams._passes import ends_block, sum_work


class Residual(Stream):
    name = "residual"
    summary = "a sum: every sublayer adds its output"
    adds = True
    policies = ("none", "block", "replay", "invert")

    def work(self, sublayer_idx, num_sublayers, shape, options, rows, item_bytes, written_bytes):
        if sublayer_idx == num_sublayers:
            return StreamWork()
        items = rows * shape.hidden_size
        size = items * item_bytes
        found = sum_work(size, items * written_bytes, item_bytes != written_bytes)
        stays = ends_block(sublayer_idx, num_sublayers, shape)
        return dataclasses.replace(found, kept_state_bytes=size if stays else 0)

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams._add import Add

        return Add()


METHODS = [Residual()]
