"""Text files to indexed datasets: inputs are cut into blocks, blocks encoded in parallel, parts appended in
order. The blocks follow from the inputs alone, so the bytes written do not depend on the workers."""
