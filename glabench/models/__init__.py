"""Language models of the paper: GLA and RetNet here, Llama and Mamba from transformers.

Importing this package registers GLA and RetNet with transformers' AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from glabench.models.config import GLAConfig, RetNetConfig
from glabench.models.language import GLAForCausalLM, RetNetForCausalLM
from glabench.models.state import RecurrentState

__all__ = ("GLAConfig", "GLAForCausalLM", "RecurrentState", "RetNetConfig", "RetNetForCausalLM")

for _config, _model in ((GLAConfig, GLAForCausalLM), (RetNetConfig, RetNetForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
