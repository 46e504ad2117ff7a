"""What several test modules share: small models, data sets, servers, and calls of the command."""
