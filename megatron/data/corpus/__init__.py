"""Where does text come from? Named corpora and the user's files, fetching and keeping them, how much is taken and what is held out of training."""
