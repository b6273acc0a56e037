"""The kinds that the sections `model`, `data` and `task` may be of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.images.section import ImageFolderData, Mnist5kData
from harness.catalogue.mlp.section import MlpModel, PerceptronModel
from harness.catalogue.pretrained.section import PretrainedModel
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.catalogue.text.section import TextData
from harness.catalogue.text_table.section import TextTableData

Model = Annotated[PerceptronModel | MlpModel | CnnModel | GptModel | PretrainedModel, Field(discriminator="kind")]

Tables = TableData | ShardedTableData | TextTableData
Data = Annotated[Mnist5kData | Tables | ImageFolderData | TextData, Field(discriminator="source")]

HIGHER_IS_BETTER = (*("val/accuracy", "val/macro_f1", "val/r2"), *ClassificationTask.metrics_of_one_class)
"""Of every other metric the lower is better."""

Task = Annotated[ClassificationTask | RegressionTask | CausalLmTask, Field(discriminator="kind")]
