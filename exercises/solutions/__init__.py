"""An answer to each exercise, which passes the tests of the exercise."""
