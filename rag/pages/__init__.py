"""What all pages share: how templates become HTML, their look (`common.css`) and light or dark (`common.js`)."""
