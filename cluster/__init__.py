"""Who is where: membership, leases and epochs in Redis, channels, the launcher, the command."""
