"""The exercises of each chapter: task, stub, reference answer, planted mistakes, and what judges them."""
