"""The peer's model as an MLServer runtime, spoken to in the Open Inference protocol."""

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from serve import FOLDER, Model


class PeerRuntime(MLModel):
    """One input a column."""

    async def load(self) -> bool:
        """Load the module once."""
        self.model = Model(FOLDER)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Class and probabilities of each row."""
        columns = {each.name: list(each.data) for each in payload.inputs}
        image = next((each for each in payload.inputs if each.name == "image"), None)
        if image is not None:
            columns = {"image": [columns["image"]]}
        rows = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        found = self.model.answer(rows)
        shares = [share for each in found for share in each["probabilities"].values()]
        outputs = [
            ResponseOutput(
                name="probabilities",
                shape=[len(rows), len(shares) // len(rows)],
                datatype="FP32",
                data=shares,
            ),
            ResponseOutput(
                name="prediction",
                shape=[len(rows)],
                datatype="BYTES",
                data=[e["prediction"] for e in found],
            ),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)
