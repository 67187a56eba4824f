"""Search for the first layer of a graph whose output leaves tolerance."""
