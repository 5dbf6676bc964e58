"""A server that speaks OpenAI's protocol, on this machine alone unless somebody says otherwise."""
