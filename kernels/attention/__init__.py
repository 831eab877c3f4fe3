"""Attention: one public function, backends with declared constraints, a choice by measurement."""
