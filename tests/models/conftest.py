import logging

import pytest
from transformers.utils import logging as hf_logging

from lion_hf.models import modeling_lion as modeling_lion


@pytest.fixture
def warnings_of(caplog):
    hf_logging.enable_propagation()
    modeling_lion.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    hf_logging.disable_propagation()
