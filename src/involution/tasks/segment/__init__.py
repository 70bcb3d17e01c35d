from .models import SemanticFPN, UPerNet
