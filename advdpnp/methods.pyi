# Written by nbs/_stubs.py, see CONTRIBUTING.md.
from typing import ClassVar
from dataclasses import dataclass
from torch import nn
from .losses import consistency
from .prototypes import Classifier
__all__ = ['METHODS', 'EXTRAS', 'Method', 'AdversarialMethod', 'AdvDPNP', 'Standard', 'PGDAT', 'TRADES', 'MART', 'DPNP', 'DualBranchLinear', 'split_name', 'method_of', 'make_net']
@dataclass(frozen=True, kw_only=True)
class Method:
    label_smoothing: float = 0.0
    prototypes: ClassVar[bool]
    adversarial: ClassVar[bool]

    def __post_init__(self): ...
    def cross_entropy(self, logits, labels): ...
    def draw(self, x, generator): ...
    def craft(self, still, x, y, noise): ...
@dataclass(frozen=True, kw_only=True)
class AdversarialMethod(Method):
    eps: float = 8 / 255
    steps: int = 10
    adversarial: ClassVar[bool]

    def __post_init__(self): ...
    def draw(self, x, generator): ...
    def craft(self, still, x, y, noise): ...
@dataclass(frozen=True, kw_only=True)
class AdvDPNP(AdversarialMethod):
    alignment: float = 0.01
    repulsion: float = 0.1
    consistency: float = 3.0
    clean_weight: float = 1.0
    clean_only_update: bool = True
    alignment_moves: str = 'both'
    repulsion_form: str = 'nearest'
    consistency_form: str = 'kl'
    shared_batch: bool = False
    prototypes: ClassVar[bool]

    def __post_init__(self): ...
    @property
    def weights(self): ...
    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class Standard(Method):

    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class PGDAT(AdversarialMethod):

    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class TRADES(AdversarialMethod):
    beta: float = 6.0

    def draw(self, x, generator): ...
    def craft(self, still, x, y, noise): ...
    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class MART(AdversarialMethod):
    beta: float = 5.0

    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class DPNP(Method):
    alignment: float = 0.1
    repulsion: float = 0.1
    prototypes: ClassVar[bool]

    def loss(self, net, x, x_adv, y): ...
@dataclass(frozen=True, kw_only=True)
class DualBranchLinear(AdversarialMethod):
    consistency: float = 1.0
    clean_weight: float = 1.0

    def loss(self, net, x, x_adv, y): ...
METHODS: dict
EXTRAS: dict
def split_name(method: str) -> tuple[str, dict]: ...
def method_of(method: str): ...
def make_net(method: str, backbone: str | nn.Module, num_classes: int, mean, std, norm: float | str='auto') -> Classifier: ...
