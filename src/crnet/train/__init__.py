"""The run, its loop and its step. ``crnet.train(...)`` calls ``crnet.api.train``."""

import crnet

crnet.make_verb(__name__)
