"A small pre-activation network for tests of batch-norm with an activation inside."
import advdpnp  # isort: skip: before timm
from timm.models import register_model

from advdpnp.backbones import CifarPreActResNet


@register_model
def test_preactresnet(pretrained=False, **kwargs):
    kwargs = {key: value for key, value in kwargs.items() if key in ("num_classes", "in_chans")}
    return CifarPreActResNet((1, 1), (16, 32), stem_chs=16, **kwargs)
