"""Model cards, licences and uploads to the Hub."""
