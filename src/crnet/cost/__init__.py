"""What a run takes, in closed forms. ``crnet.cost(...)`` calls ``crnet.api.cost``."""

import crnet

crnet.make_verb(__name__)
