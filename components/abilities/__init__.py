"""What a trained URM can do with words: explain a user, keep its language, follow guidance."""
