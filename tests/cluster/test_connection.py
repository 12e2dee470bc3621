"""Joining a Ray that is not there."""

import pytest

from pipeline.cluster.connection import connected, joined
from pipeline.cluster.startup import ClusterError
from pipeline.config import ClusterConfig
from tests.servers import free_ports


@pytest.mark.timeout(30)  # Ray itself would try for minutes
def test_where_no_ray_answers_the_error_names_the_address_and_what_to_give() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    words = rf"no Ray answers at {address}: .*refused.*"
    with (
        pytest.raises(ClusterError, match=words + r"cluster\.address as <head's ip>:6379"),
        connected(ClusterConfig(address=address), {}),
    ):
        pass
    with pytest.raises(ClusterError, match=words + "--address as"), joined(address):
        pass
    with pytest.raises(ClusterError, match="no Ray answers at head"), connected(ClusterConfig(address="head"), {}):
        pass
