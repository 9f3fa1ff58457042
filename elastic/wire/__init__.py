"""Where controller, agents, workers and people meet: the generated contracts, their translation, their channels.

Everything that knows protobuf or gRPC and is needed on both sides of a wire lives here. It holds no policy.
"""
