"""Heads have the layers the papers draw."""

import torch
from torch import nn

from pipeline.models.heads import mlp


def test_layers_of_a_projection_head_in_order() -> None:
    kinds = [type(layer) for layer in mlp([8, 16, 16, 4], last_bn="plain")]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]


def test_a_linear_before_batchnorm_has_no_bias_and_the_last_one_has() -> None:
    head = mlp([8, 16, 4])
    assert head[0].bias is None
    assert head[-1].bias is not None
    assert mlp([8, 16, 4], last_bias=False)[-1].bias is None
    assert [type(layer) for layer in mlp([8, 16, 4], hidden_bn=False)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_the_last_batchnorm_has_the_parameters_it_should() -> None:
    def trained(head: nn.Sequential) -> set[str]:
        return {name for name, p in head[-1].named_parameters() if p.requires_grad}

    assert trained(mlp([8, 4], last_bn="affine")) == {"weight", "bias"}
    assert trained(mlp([8, 4], last_bn="scale")) == {"weight"}
    assert trained(mlp([8, 4], last_bn="plain")) == set()


def test_output_of_a_scale_only_batchnorm_is_centred() -> None:
    out = mlp([8, 16, 4], last_bn="scale")(torch.randn(32, 8))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), rtol=0, atol=1e-6)
