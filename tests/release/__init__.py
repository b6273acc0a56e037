"""What stands between a checkout and its users: locked dependencies, their licences, an environment, a release."""
