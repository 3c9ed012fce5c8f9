"""A lean load generator for servers that speak OpenAI's API: real prompts, open and closed workloads, paired arms."""
