"""What SageMaker's training jobs and endpoints run, and the requests that start them."""
