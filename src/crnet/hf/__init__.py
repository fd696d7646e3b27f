"""CR-Net in transformers: ``import crnet.hf`` and the Auto classes know every checkpoint.

    configuration   CRNetConfig: the package's model configuration, and the names that engines read
    modeling        CRNetModel, CRNetForCausalLM: the modules of ``crnet.model``, called as
                    transformers calls a model
    attention       attention by the function, the mask and the cache that transformers chose
    parts           the plan by which several processes share the maps, and what a part of one does

There is one implementation of the model: this room has no product, no norm and no parameter of its
own. transformers is imported here and nowhere below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from crnet.errors import ConfigError

try:
    import transformers
except ImportError as error:
    raise ConfigError("crnet.hf needs the package transformers; pip install 'crnet[hf]'") from error

from crnet.adapters.maps import adaptable
from crnet.hf.configuration import CRNetConfig
from crnet.hf.modeling import CRNetForCausalLM, CRNetModel

__all__ = ["CRNetConfig", "CRNetForCausalLM", "CRNetModel", "adaptable", "register"]


def register() -> None:
    """Tell transformers' Auto classes of the model, and what looks for the class that
    ``config.json`` names in transformers alone (``transformers serve``); as often as one likes."""
    transformers.AutoConfig.register(CRNetConfig.model_type, CRNetConfig, exist_ok=True)
    transformers.AutoModel.register(CRNetConfig, CRNetModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(CRNetConfig, CRNetForCausalLM, exist_ok=True)
    for package in _every_transformers():
        package.CRNetForCausalLM = CRNetForCausalLM


def _every_transformers() -> Iterator[Any]:
    """The package, as every module that is loaded holds it: it replaces itself by a second one
    while it is read (``transformers.utils.direct_transformers_import``)."""
    for module in list(sys.modules.values()):
        found = vars(module).get(transformers.__name__)
        if isinstance(found, ModuleType) and found.__name__ == transformers.__name__:
            yield found
    yield sys.modules[transformers.__name__]


register()
