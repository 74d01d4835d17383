"""What every worker is, whatever its role: composition, life, channels, presence."""
