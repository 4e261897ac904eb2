"""The releases of vLLM that we support, as far as our classes touch them: recorded from its wheels, checked in CI.

pip download --no-deps vllm==0.33.0; unzip it somewhere
python -m tests.vllm.releases record FOLDER...    a record for the vLLM in each, beside this file
python -m tests.vllm.releases table               README's table from the records
"""
