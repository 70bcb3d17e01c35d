"""Networks for other runtimes: ONNX, torch.export's programs, AOTInductor's packages."""

from .programs import decompositions, to_aoti, to_onnx, to_pt2, trace

__all__ = ["decompositions", "to_aoti", "to_onnx", "to_pt2", "trace"]
