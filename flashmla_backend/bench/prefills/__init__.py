"""Short prompts behind a cached context, decoded by the MQA kernels or prefilled: which takes the engine longer."""
