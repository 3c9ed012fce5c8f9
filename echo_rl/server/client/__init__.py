"""The API's side of the engine process: requests in, outputs out, restarts."""
